"""The balanced data set for others: image folders, Hugging Face parquet, WebDataset, each with its card."""

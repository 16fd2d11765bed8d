"""Studies: a grid of recipes, each trained, synthesized and judged with the same recognizers and seeds, beside the paper's figures."""

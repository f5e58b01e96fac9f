"""The paper's tables and figures, made again with a small model: what is claimed, what is run, what came out."""

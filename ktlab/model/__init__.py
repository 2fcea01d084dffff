"""A model whose stages can be looked into, switched, traced and counted."""

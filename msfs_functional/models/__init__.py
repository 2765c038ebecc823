"""Models: an nn.Module skeleton per architecture, used through `functional(...)` only."""

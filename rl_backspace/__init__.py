"""Language models that can take it back: see README.md, and `semantics` for what a delete means."""

"""Foreign formats: one file per format; `write` is where the pipeline enters."""

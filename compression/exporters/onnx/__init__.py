"""A language model as an ONNX graph with a key-value cache: built, coded, and judged as it is served."""

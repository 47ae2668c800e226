"""The ONNX carrier: decoder and encoder graphs for stock ONNX Runtime, written from our spec without tracing."""

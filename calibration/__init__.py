"""Calibration: a bundle and sample video in, a quantized bundle and its accuracy report out.

- `clips`: video at the model's size;
- `observe`, `entropy`: the range of what enters linear layers, from steps with live memory;
- `smooth`, `quantize`, `memory`: rewriting a step graph to INT8, its linear layers and its states;
- `integer`: whether ONNX Runtime then computes with integers;
- `compare`: two precisions side by side, by age of the stream;
- `sensitivity`: which layers suffer, and the fewest that must stay in float;
- `calibrate`: all of it in order; `report`: what it found, for people and for machines.
"""

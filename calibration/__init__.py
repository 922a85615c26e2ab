"""Calibration: a bundle and sample video in, a quantized bundle and its accuracy report out.

- `clips`: video at the model's size;
- `linears`: the linear layers of a step graph;
- `observe`: the range of what enters them, from steps with live memory;
- `smooth`, `quantize`, `half`: rewriting a step graph to INT8 and to FP16;
- `compare`: two precisions side by side, by age of the stream;
- `sensitivity`: which layers suffer, and the fewest that must stay in float;
- `calibrate`: all of it in order; `report`: what it found, for people and for machines.
"""

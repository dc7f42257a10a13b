"""What a decoder is made of, and one module per family that translates Hugging Face's config and tensors to that.

    spec.py       DecoderSpec: norms, positions, activation, biases, heads, windows; names and shapes of arrays
    rotary.py     rotary positions with their scaling: angles, and the config keys they come from
    hf_config.py  reading `config.json`: transformers' defaults, refusal of keys that are not understood
    angles.py     the angles of rotary positions
    tensors.py    how Hugging Face's tensors become our arrays, both ways
    registry.py   finds the family of a `config.json`
    arrays.py     the arrays of a checkpoint
    layer_types.py  which layers attend to a sliding window
    families/     one module per family, named as its `model_type`

A new family is one module in `families/` and its test. Nothing here imports torch or onnx, and nothing outside of this
package names a family.
"""

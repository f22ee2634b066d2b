"""Checkpoints of other formats and types written anew: DeepSpeed's GPT-NeoX, TensorFlow's GPT-2, any source streamed.
No model is built here; the command is launch/commands/convert.
"""

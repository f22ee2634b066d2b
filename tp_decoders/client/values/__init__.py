"""What goes in and comes out as plain values: prompts and options to messages, messages to frozen dataclasses."""

"""Recording one forward's kernel calls and making them again without the interpreter: program, recorder, and whether
the modules are still those that were recorded. Knows no model, request or cache; what a step is, is its caller's.
"""

"""From rows of logits to tokens and answers: penalties, top-k and top-p, draws, log-probabilities, pooled rows,
candidates of beams. Which beams go on is beams/'s; random numbers are engine/rng's.
"""

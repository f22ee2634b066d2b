"""Drafts of the tokens to come, and how many a step is given: by what text they are found, when they stop.
Whether a draft was right is decided in schedule/, by the token that is drawn; nothing here can change an answer.
"""

"""Studies: a grid of recipes, trained on the same tokens with several seeds, and compared.

``plan`` says which studies there are, ``run`` trains and traces one model, ``study`` does all
runs and ``summary`` is array work on their traces.
"""

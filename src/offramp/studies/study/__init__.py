"""Studies: a grid of recipes, trained on the same tokens with several seeds, and compared.

``studies`` lists them, ``grid`` plans the runs, ``run`` trains and evaluates one model, ``study``
does all runs that are missing, and ``summary`` compares them by array work on their frontiers.
"""

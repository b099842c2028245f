"""Models: the waist that every feature talks through, and what implements it."""

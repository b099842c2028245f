"""Training a native decoder with any objective, in one process or many; runs that survive being
killed.
"""

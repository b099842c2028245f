"""The native decoder's steps of a few tokens in fixed shapes, which a GPU replays as graphs."""

"""Reproduction of the seed document's Experiments 5 and 6.

The seed document is "Experiment 5 & 6: Asymmetric Auxiliary Loss Training" (in Japanese), which
builds on Elbayad et al. (2020), "Depth-Adaptive Transformer". Its goal:
「L1（Shallow）とL3（Deep）に異なる重みでロスを適用し、各パスを専門化させる」,
"give the losses at L1 (shallow) and L3 (deep) different weights, so that each path specialises".
"""

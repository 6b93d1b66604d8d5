"""Linear cluster heads on shared features, and everything about them.

`linear` holds the heads, `selection` selects the best of them and the epoch, `consensus` compares
them, `features` computes their inputs, and `partition` decides how ranks divide the work.

The loss and its gradient by one head's logits exist in three forms with the same interface
(`torch_head.Head`):

================  ==============  ===================================
`torch_head`      PyTorch         the readable form, any device and dtype
`cpu_loops`       numba           float32 on a CPU
`gpu_kernels`     Triton          float32 on a GPU
================  ==============  ===================================

`autograd` chooses the form and makes an autograd function of it, `products` multiplies features and
weights, and `split_clusters` is the loss when the clusters of a head are split over ranks.

Shapes in this package: B or b pairs of this rank (an anchor and its neighbour), X = 2 b rows of
both views (anchors above neighbours), D width of a feature, H heads, C clusters of one head, S
clusters of all heads one after the other, W ranks. p and q are the probabilities of an anchor and
its neighbour, a and n their logits.
"""

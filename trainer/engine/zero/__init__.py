"""Put another block's parameters into a slot of a running ZeRO optimizer, in place.

This is the only folder that uses DeepSpeed's private names, with one file for each stage, as DeepSpeed has.

How it works. ZeRO keeps, for each optimizer group, one flat buffer of weights and one flat fp32 master with its
Adam moments; everything else is bookkeeping that says where each parameter is. Strata gives every active block
groups of its own (a *slot*). A switch copies the leaving block's weights out of the slot's flat buffer into storage
of their own, the entering block's weights in, and corrects the bookkeeping. Nothing is rebuilt: the optimizer, its
groups, the always-on state, ZeRO-3's module hooks and its fetch trace stay the objects that they were, no collective
runs, and at most one parameter more than before is alive at any moment (one group, if blocks differ in shape).
"""

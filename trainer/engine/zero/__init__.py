"""Put another block's parameters into a slot of a running ZeRO optimizer, in place.

This is the only folder that uses DeepSpeed's private names, with one file for each stage, as DeepSpeed has.

How it works. ZeRO keeps, for each optimizer group, one flat buffer of weights and one flat buffer of fp32 master
weights with Adam's moments. Everything else is bookkeeping: which parameter is at which offset of which buffer. Strata
gives every active block groups of its own (a *slot*). A switch copies the leaving block's weights out of the slot's
buffer into new storage, copies the entering block's weights in, and corrects the bookkeeping. Nothing is rebuilt: the
optimizer, its groups, the always-on state, ZeRO-3's module hooks and its fetch trace stay the same objects. No
collective runs, and the extra memory is one parameter at a time or, if blocks differ in shape, one group.
"""

"""Mending a store: exactly what `verify` finds damaged is made again, from what made it, or it is said why not.

Three rules hold everywhere here. What cannot be proved to be what was there (the same weights, images, receipts,
digests) is not written. What is there stays until its replacement is on disk. Files that are not the store's own are
named and left alone.
"""

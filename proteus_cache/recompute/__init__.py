"""The teacher again on a few stored views: is what a store holds what the teacher says?

Checksums prove that bytes are those that were written. This proves that what was written is right: that codes belong
to their views, and that the teacher that is named made them.
"""

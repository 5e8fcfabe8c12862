"""The cache: what extract writes. Layout, manifest, receipts, the commit of one unit, reading and verifying."""

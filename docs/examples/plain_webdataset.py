"""Stream the demo's pack with plain webdataset; proteus_cache only decodes."""

import torch
import webdataset

import proteus_cache

pack = proteus_cache.open_pack("proteus/demo/pack")
tars = [str(path) for view in pack.views for path in sorted((pack.path / view).glob("*.tar"))]
stream = webdataset.WebDataset(tars, shardshuffle=100).shuffle(1000).decode("rgb8")
for keys, views, codes, documents in stream.to_tuple("__key__", "jpg", "codes", "json").batched(8):
    pixels = pack.normalise(torch.stack([torch.from_numpy(view) for view in views]))
    targets = pack.decode(torch.stack([torch.frombuffer(bytearray(code), dtype=torch.uint8) for code in codes]))
    labels = [document["label"] for document in documents]
    print(keys[0], labels[0], tuple(pixels.shape), {name: tuple(tokens.shape) for name, tokens in targets.items()})

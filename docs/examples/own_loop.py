"""Train a timm model on the demo's pack with a loop of your own."""

import timm
import torch

import proteus_cache

pack = proteus_cache.open_pack("proteus/demo/pack")
vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=pack.side_px, patch_size=pack.teacher.patch_px)
head = torch.nn.Linear(vit.num_features, pack.teacher.width)
optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=5e-4)
for batch in pack.batches(batch_size=8, n_steps=20):
    tokens = head(vit.forward_features(batch.pixels))  # CLS, then a token for each patch
    loss = (tokens[:, 0] - batch.targets["cls"]).square().mean()
    loss += (tokens[:, 1:] - batch.targets["patch"]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {batch.step}: loss {loss.item():.4f}")

"""The models that are trained: registry of sizes, the masked forward pass, and the heads that face the teacher."""

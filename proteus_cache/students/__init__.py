"""The models that are trained: sizes, the masked forward pass, and the heads that face the teacher."""

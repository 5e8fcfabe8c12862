"""Views: from an image to the exact pixels that teacher and student see.

`recipe` draws what is to be done, `render` does it, `encode` turns pixels into bytes and back, `make` joins
them. Nothing here knows of stores, teachers or torch.
"""

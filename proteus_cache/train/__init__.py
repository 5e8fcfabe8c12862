"""Stage 2: a pack becomes a student. Config, schedule, masks, checkpoints and the loop that joins them."""

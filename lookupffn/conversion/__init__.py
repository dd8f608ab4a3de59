"""Conversion of pretrained encoders: their feed-forward layers become lookups, distilled from the model itself."""

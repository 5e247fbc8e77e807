"""`engine study`: several encoders, with and without their positions, on every axis."""

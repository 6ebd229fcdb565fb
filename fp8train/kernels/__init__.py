"""Operations with more than one implementation: a reference in plain torch and what a device does better."""

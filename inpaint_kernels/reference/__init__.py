"""Plain PyTorch references, written to be read beside the papers; the judge in the tests."""

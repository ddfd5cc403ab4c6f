"""The demonstration: a real small model, real French biomedical text, the whole path without a network hub."""

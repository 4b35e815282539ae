"""Head and towers trained from the images, past the store."""

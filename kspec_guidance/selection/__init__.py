"""Choice among generators while they run: which arm should make the next image, by quality, diversity or cost."""

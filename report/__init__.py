"""What people look at: the picture of a layer, and a report as a page. Nothing here measures anything."""

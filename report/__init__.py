"""What people look at: a layer's picture, a report as a page. Nothing here measures anything."""

"""Imported first by what one runs. Importing torch makes few cycles and many objects: without the
garbage collector it takes a sixth less time. `base.console.console` turns the collector on."""

import gc

gc.disable()

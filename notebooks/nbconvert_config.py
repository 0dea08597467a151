"""For jupyter nbconvert: cells that need a download are left alone, and nothing of the machine that
runs the notebooks gets into the files.
"""

c = get_config()  # noqa: F821, which nbconvert provides
c.ExecutePreprocessor.skip_cells_with_tag = "nbval-skip"
c.ExecutePreprocessor.record_timing = False
c.ExecutePreprocessor.timeout = 600
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {"tags"}
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", ("language_info", "name")}

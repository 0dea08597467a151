"""For jupyter nbconvert: cells that need a download are left alone, and nothing gets into the files
of progress bars, of sliders, which need a kernel, or of the machine that runs the notebooks.
"""

import re

from nbconvert.preprocessors import Preprocessor


class WithoutBars(Preprocessor):
    """Takes bars and sliders out of a cell's outputs, no warning; what it printed is one text."""

    def preprocess_cell(self, cell, resources, index):
        kept = []
        for output in cell.get("outputs", []):
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                continue
            if output.get("name") == "stderr":
                output.text = re.sub(r"[\r\n]*stage \d:[^\r\n]*", "", output.text).strip()
                if not output.text:
                    continue
            if kept and output.get("name") == kept[-1].get("name", "no name"):
                kept[-1].text += output.text
            else:
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
        return cell, resources


c = get_config()  # noqa: F821, which nbconvert provides
c.Exporter.preprocessors = [WithoutBars]
c.ExecutePreprocessor.skip_cells_with_tag = "nbval-skip"
c.ExecutePreprocessor.record_timing = False
c.ExecutePreprocessor.timeout = 600
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = {"tags"}
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", ("language_info", "name")}

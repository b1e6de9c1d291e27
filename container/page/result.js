// The finished picture: compared with the photo, and to be kept.

import { Compare } from "/page/compare.js";
import { resultName } from "/page/request_text.js";

const FORMATS = { 0xff: "jpeg", 0x89: "png", 0x52: "webp" }; // by the first byte of a file

const find = (id) => document.getElementById(id);

export class Result {
  #compare = new Compare(find("compare"));

  get isShown() {
    return !find("compare").hidden;
  }

  /** @param result what the service answered; `photo` is the file that it was made from. */
  async show(result, photo, tookMs) {
    const bytes = Uint8Array.from(atob(result.imageBase64), (character) => character.charCodeAt(0));
    const format = FORMATS[bytes[0]];
    const file = new Blob([bytes], { type: `image/${format}` });
    await this.#compare.show(photo, file);
    this.#offer(file, resultName(format));
    find("result-tag").textContent = `${result.width} × ${result.height}, ${(tookMs / 1000).toFixed(1)} s`;
    this.#tell({
      Seed: result.seed,
      Mask: result.mask_source === "given" ? "edited" : "automatic",
      Engine: result.engine,
      Job: result.job_id,
    });
  }

  #offer(file, name) {
    const link = find("download");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(file);
    link.download = name;
    link.hidden = false;
  }

  #tell(facts) {
    const rows = Object.entries(facts).map(([name, value]) => {
      const row = document.createElement("div");
      row.append(document.createElement("dt"), document.createElement("dd"));
      row.firstChild.textContent = name;
      row.lastChild.textContent = value;
      return row;
    });
    find("facts").replaceChildren(...rows);
    find("facts").hidden = false;
  }
}

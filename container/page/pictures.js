// The pictures of a request: chosen, dropped, pasted, or drawn by the service as examples.

const TYPES = ["image/jpeg", "image/png", "image/webp"];
const WORDS = {
  person: ["Photo", "Photo of a person"],
  upper: ["Top", "Picture of a top"],
  lower: ["Bottom", "Picture of a bottom"],
  dress: ["Dress or one piece", "Picture of a dress or one piece"],
};
const NO_PICTURE = "The image must be a still JPEG, PNG or WebP.";
const DAMAGED = "The image file is damaged or is not an image.";

/** The tiles; `picture(name)` is {file, name, url, width, height, shown} or null. */
export class Pictures {
  #tiles = new Map();
  #changed;
  limits = { bytes: Infinity, side: 1, pixels: Infinity, aspect: Infinity };

  /** @param changed called with the name of a picture that came or went. */
  constructor(root, changed) {
    this.#changed = changed;
    for (const element of root.querySelectorAll(".tile")) this.#tiles.set(element.dataset.picture, this.#build(element));
    addEventListener("dragover", (event) => event.preventDefault()); // a file that misses its tile is not opened instead
    addEventListener("drop", (event) => event.preventDefault());
    addEventListener("paste", (event) => this.#paste(event));
  }

  picture(name) {
    return this.#tiles.get(name).picture;
  }

  /** Shows these tiles and no others. */
  show(names) {
    for (const [name, tile] of this.#tiles) tile.element.hidden = !names.includes(name);
  }

  setError(name, sentence) {
    const tile = this.#tiles.get(name);
    tile.error.textContent = sentence;
    tile.element.classList.toggle("wrong", sentence !== "");
    tile.input.setAttribute("aria-invalid", String(sentence !== ""));
  }

  focus(name) {
    this.#tiles.get(name).input.focus();
  }

  /** Takes a file, if it is a picture that the service may take. */
  async set(name, file, fileName = file.name, url = null) {
    const tile = this.#tiles.get(name);
    const turn = (tile.turn += 1);
    const shown = URL.createObjectURL(file);
    const refusal = await this.#refusal(file, shown, tile.image);
    if (turn !== tile.turn) return URL.revokeObjectURL(shown); // another file came meanwhile
    this.#take(tile, null);
    this.setError(name, refusal ?? "");
    if (refusal !== null) {
      URL.revokeObjectURL(shown);
    } else {
      const size = { width: tile.image.naturalWidth, height: tile.image.naturalHeight };
      this.#take(tile, { file, name: fileName, url, shown, ...size });
    }
    this.#changed(name);
  }

  /** Takes the pictures that the service draws under this number. */
  async useExample(number) {
    for (const name of this.#tiles.keys()) {
      const url = `/page/examples/${number}/${name}.png`;
      const response = await fetch(url);
      if (!response.ok) throw new Error(`${url}: ${response.status}`);
      await this.set(name, await response.blob(), `${name}.png`, url);
    }
  }

  #take(tile, picture) {
    if (tile.picture) URL.revokeObjectURL(tile.picture.shown);
    tile.picture = picture;
    tile.element.classList.toggle("filled", picture !== null);
    tile.remove.hidden = tile.image.hidden = picture === null;
    tile.hint.textContent = picture?.name ?? "Choose or drop";
    tile.input.value = "";
  }

  /** Why the file cannot be taken, or null; the image shows it then. */
  async #refusal(file, shown, image) {
    if (file.size > this.limits.bytes) return "The image file is too large.";
    if (!TYPES.includes(file.type)) return NO_PICTURE;
    image.src = shown;
    try {
      await image.decode();
    } catch {
      return DAMAGED;
    }
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    const long = Math.max(width, height) > this.limits.aspect * Math.min(width, height);
    if (Math.min(width, height) < this.limits.side || long) return "The image is too small, or too long for its width.";
    return width * height > this.limits.pixels ? "The image has too many pixels." : null;
  }

  #paste(event) {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    const shown = [...this.#tiles].filter(([, tile]) => !tile.element.hidden);
    const focused = shown.find(([, tile]) => tile.element.contains(document.activeElement));
    const empty = shown.find(([, tile]) => tile.picture === null);
    const [name] = focused ?? empty ?? shown[0];
    this.set(name, file);
  }

  #build(element) {
    const name = element.dataset.picture;
    const [title, label] = WORDS[name];
    const drop = make("label", "drop");
    const input = make("input", "unseen", { type: "file", accept: TYPES.join(","), ariaLabel: label });
    const image = make("img", "", { alt: "", hidden: true });
    const hint = make("span", "tile-hint", { textContent: "Choose or drop" });
    const texts = make("span", "tile-texts");
    texts.append(make("span", "tile-title", { textContent: title }), hint);
    const remove = make("button", "remove", { type: "button", hidden: true, textContent: "×" });
    remove.setAttribute("aria-label", `Remove: ${title.toLowerCase()}`);
    const error = make("p", "error", { id: `error-${name}` });
    error.setAttribute("role", "alert");
    input.setAttribute("aria-describedby", error.id);
    drop.append(input, image, texts);
    element.append(drop, remove, error);
    const tile = { element, input, image, hint, remove, error, picture: null, turn: 0 };

    input.addEventListener("change", () => input.files[0] && this.set(name, input.files[0]));
    remove.addEventListener("click", () => {
      tile.turn += 1;
      this.#take(tile, null);
      this.setError(name, "");
      input.focus();
      this.#changed(name);
    });
    for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, () => element.classList.add("over"));
    for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => element.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files[0]) this.set(name, event.dataTransfer.files[0]);
    });
    return tile;
  }
}

function make(tag, className, properties = {}) {
  return Object.assign(document.createElement(tag), { className }, properties);
}

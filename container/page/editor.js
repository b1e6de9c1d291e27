// The mask of a photo, painted and erased by pointer, touch or keys.

const LONGEST_SIDE = 2048; // px of the mask: the model sees no more, and a phone has little memory
const UNDOABLE = 100; // strokes; older ones stay, but cannot be undone
const TINT = [92, 72, 255];
const STEP = 1 / 40, SMALL_STEP = 1 / 200; // of the longer side, by an arrow key
const HALF = 128;

/** Where cloth is repainted: opaque pixels of a canvas that lies over the photo. */
export class MaskEditor {
  #canvas;
  #ring;
  #context;
  #type = null; // of the cloth that is chosen
  #automatic = new Map(); // by their types
  #history = [{ automatic: true, layer: null }]; // strokes, and layers that replace all before; the first one stays
  #stroke = null; // the last of them, while it is painted
  #cursor = { x: 0, y: 0 };
  #changed;

  erasing = false;
  brush = 0.07; // its diameter, of the longer side

  /** @param changed called after each change, also of the tool. */
  constructor(canvas, ring, changed) {
    this.#canvas = canvas;
    this.#ring = ring;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    this.#changed = changed;
    this.#listen();
  }

  /** Begins anew for a photo of that size, none of whose automatic masks is known. */
  open(width, height) {
    const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
    this.#canvas.width = Math.max(1, Math.round(width * scale));
    this.#canvas.height = Math.max(1, Math.round(height * scale));
    this.#history = [{ automatic: true, layer: null }];
    this.#stroke = null;
    this.#automatic.clear();
    this.#cursor = { x: this.#canvas.width / 2, y: this.#canvas.height / 2 };
    this.#settle();
  }

  /** The pixels of the brush's diameter, on the photo as it is masked. */
  get brushPixels() {
    return Math.max(1, Math.round(this.brush * Math.max(this.#canvas.width, this.#canvas.height)));
  }

  get canUndo() {
    return this.#history.length > 1;
  }

  /** Whether the automatic mask of the chosen type is known. */
  get hasAutomatic() {
    return this.#automatic.has(this.#type);
  }

  /** Whether the mask is the user's own; if not, it is the automatic one of the chosen type, empty while unknown. */
  get isEdited() {
    return !this.#history.at(-1).automatic;
  }

  /** Takes the type of the cloth that is chosen, and its automatic mask, if it is known. */
  chooseType(type) {
    this.#type = type;
    this.useAutomatic();
  }

  /** Takes the automatic mask of a type, a grey picture, and shows it if that type is chosen. */
  keepAutomatic(type, picture) {
    this.#automatic.set(type, this.#tinted(picture));
    if (type === this.#type) this.useAutomatic();
  }

  /** Lays the automatic mask in, which can be undone where something was painted before. */
  useAutomatic() {
    if (this.isEdited && this.hasAutomatic) this.#add({ automatic: true });
    this.#settle();
  }

  clear() {
    this.#add({ layer: null });
    this.#settle();
  }

  undo() {
    this.#stroke = null;
    if (this.canUndo) this.#history.pop();
    this.#settle();
  }

  /** The part of the photo that is repainted, 0 to 1. */
  coverage() {
    const small = this.#layer(128, 128);
    const context = small.getContext("2d");
    context.drawImage(this.#canvas, 0, 0, 128, 128);
    const pixels = context.getImageData(0, 0, 128, 128).data;
    let covered = 0;
    for (let place = 3; place < pixels.length; place += 4) covered += pixels[place];
    return covered / (255 * 128 * 128);
  }

  /** The mask as a PNG file: white is repainted, black is kept. */
  file() {
    const { width, height } = this.#canvas;
    const pixels = this.#context.getImageData(0, 0, width, height);
    const shades = pixels.data;
    for (let place = 0; place < shades.length; place += 4) {
      shades.fill(shades[place + 3] >= HALF ? 255 : 0, place, place + 3);
      shades[place + 3] = 255;
    }
    const layer = this.#layer();
    layer.getContext("2d").putImageData(pixels, 0, 0);
    return new Promise((resolve) => layer.toBlob(resolve, "image/png"));
  }

  /** Puts the ring where the brush is. */
  showRing() {
    const scale = this.#canvas.clientWidth / this.#canvas.width;
    const size = this.brushPixels * scale;
    this.#ring.style.width = this.#ring.style.height = `${size}px`;
    const left = this.#cursor.x * scale - size / 2;
    const top = this.#cursor.y * scale - size / 2;
    this.#ring.style.transform = `translate(${left}px, ${top}px)`;
    this.#ring.classList.toggle("erasing", this.erasing);
  }

  #layer(width = this.#canvas.width, height = this.#canvas.height) {
    const layer = document.createElement("canvas");
    layer.width = width;
    layer.height = height;
    return layer;
  }

  /** A grey picture of a mask as tinted pixels, at the size of this one. */
  #tinted(picture) {
    const layer = this.#layer();
    const context = layer.getContext("2d");
    context.drawImage(picture, 0, 0, layer.width, layer.height);
    const pixels = context.getImageData(0, 0, layer.width, layer.height);
    const shades = pixels.data;
    for (let place = 0; place < shades.length; place += 4) {
      const shown = shades[place] >= HALF;
      shades.set(TINT, place);
      shades[place + 3] = shown ? 255 : 0;
    }
    context.putImageData(pixels, 0, 0);
    return layer;
  }

  #add(change) {
    this.#stroke = null;
    this.#history.push(change);
    if (this.#history.length <= 1 + UNDOABLE) return;
    const layer = this.#layer();
    const oldest = this.#history.splice(0, 2);
    for (const each of oldest) this.#apply(layer.getContext("2d"), each);
    this.#history.unshift({ automatic: oldest[1].automatic, layer });
  }

  /** Draws the mask; an automatic one that nothing lies on is that of the type that is chosen now. */
  #settle() {
    const last = this.#history.at(-1);
    if (last.automatic) last.layer = this.#automatic.get(this.#type) ?? null;
    for (const change of this.#history) this.#apply(this.#context, change);
    this.#changed();
  }

  #apply(context, change) {
    if (change.points) {
      change.points.forEach((_, place) => this.#applySegment(context, change, place));
      return;
    }
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    if (change.layer) context.drawImage(change.layer, 0, 0);
  }

  /** One piece of a stroke, up to the point at that place: what is redrawn is what was drawn. */
  #applySegment(context, stroke, place) {
    const end = stroke.points[place];
    const start = stroke.points[Math.max(0, place - 1)];
    context.globalCompositeOperation = stroke.erasing ? "destination-out" : "source-over";
    context.strokeStyle = `rgb(${TINT.join(" ")})`;
    context.lineWidth = stroke.width;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(start.x, start.y);
    context.lineTo(end.x, end.y + (start === end ? 0.01 : 0)); // a line without length is not drawn
    context.stroke();
  }

  #beginStroke() {
    const stroke = { points: [{ ...this.#cursor }], width: this.brushPixels, erasing: this.erasing };
    this.#add(stroke);
    this.#stroke = stroke;
    this.#apply(this.#context, stroke);
    this.#changed();
  }

  #extendStroke() {
    this.#stroke.points.push({ ...this.#cursor });
    this.#applySegment(this.#context, this.#stroke, this.#stroke.points.length - 1);
  }

  #endStroke() {
    if (!this.#stroke) return;
    this.#stroke = null;
    this.#changed();
  }

  #moveTo(x, y) {
    this.#cursor = {
      x: Math.min(this.#canvas.width, Math.max(0, x)),
      y: Math.min(this.#canvas.height, Math.max(0, y)),
    };
    this.showRing();
  }

  #moveToPointer(event) {
    const box = this.#canvas.getBoundingClientRect();
    const scale = this.#canvas.width / box.width;
    this.#moveTo((event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
  }

  #listen() {
    const canvas = this.#canvas;
    const hide = () => (this.#ring.hidden = document.activeElement !== canvas && !canvas.matches(":hover"));
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !event.isPrimary) return this.#dropStroke();
      canvas.setPointerCapture(event.pointerId);
      this.#ring.hidden = false;
      this.#moveToPointer(event);
      this.#beginStroke();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!event.isPrimary) return;
      this.#ring.hidden = false;
      for (const each of this.#stroke ? event.getCoalescedEvents?.() ?? [] : []) {
        this.#moveToPointer(each);
        this.#extendStroke();
      }
      this.#moveToPointer(event);
      if (this.#stroke) this.#extendStroke();
    });
    canvas.addEventListener("pointerup", () => this.#endStroke());
    canvas.addEventListener("pointercancel", () => this.#dropStroke());
    canvas.addEventListener("pointerleave", hide);
    canvas.addEventListener("focus", () => {
      this.#ring.hidden = false;
      this.showRing();
    });
    canvas.addEventListener("blur", () => {
      this.#endStroke();
      hide();
    });
    canvas.addEventListener("keydown", (event) => this.#onKeyDown(event));
    canvas.addEventListener("keyup", (event) => {
      if (event.key === " ") this.#endStroke();
    });
    new ResizeObserver(() => this.showRing()).observe(canvas);
  }

  /** A second finger makes a gesture of what looked like a stroke. */
  #dropStroke() {
    if (this.#stroke) this.undo();
  }

  #onKeyDown(event) {
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key !== "z") return;
      this.undo();
    } else if (event.altKey) {
      return;
    } else if (key.startsWith("arrow")) {
      const longer = Math.max(this.#canvas.width, this.#canvas.height);
      const step = longer * (event.shiftKey ? SMALL_STEP : STEP);
      const { x, y } = this.#cursor;
      this.#moveTo(
        x + step * ((key === "arrowright") - (key === "arrowleft")),
        y + step * ((key === "arrowdown") - (key === "arrowup")),
      );
      if (this.#stroke) this.#extendStroke();
    } else if (key === " ") {
      if (!this.#stroke) this.#beginStroke();
    } else if (key === "p" || key === "e") {
      this.erasing = key === "e";
      this.#changed();
    } else if (key === "[" || key === "]") {
      this.brush = Math.min(0.3, Math.max(0.01, this.brush + (key === "]" ? 0.01 : -0.01)));
      this.#changed();
    } else {
      return;
    }
    event.preventDefault();
  }
}

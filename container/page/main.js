// The page: what is chosen, the mask, the run, and the same request as text.

import { readMask, readSettings, ServiceError, tryOn } from "/page/api.js";
import { copy } from "/page/copy.js";
import { MaskEditor } from "/page/editor.js";
import { OPTIONS, optionValues, refusalOf, setOptions } from "/page/options.js";
import { Pictures } from "/page/pictures.js";
import { boto3Text, curlText } from "/page/request_text.js";
import { Result } from "/page/result.js";
import { advise, adviseNothing } from "/page/retry.js";

const POLL_MS = 1500, IDLE_POLL_MS = 15000;
const OF_THE_PHOTO = ["person_not_found", "mask_invalid"]; // what to do about them is done on the mask
const HEALTH = { healthy: "Ready", loading: "The model is loading", unhealthy: "Not serving", unreachable: "Not reachable" };
const NOT_NOW = {
  loading: "The model is still loading. Wait a moment and try again.",
  unhealthy: "The service takes no requests now.",
  unreachable: "The service cannot be reached.",
};

const find = (id) => document.getElementById(id);
const state = {
  health: "loading",
  masking: new AbortController(), // of the masks of the photo
  pending: new Set(), // the types whose masks are on their way
  running: null, // that of the try-on
  photo: null, // the picture that the editor is open for
  example: -1,
  examples: 1,
  ratio: 3 / 4, // of what the model makes
  known: false, // whether the service was reached
  poll: 0, // the timer of the next look at the service
};

const pictures = new Pictures(find("tiles"), onPicture);
const result = new Result();
const editor = new MaskEditor(find("mask-canvas"), find("mask-ring"), onMask);

// --- what is set

const clothTypeInput = () => document.querySelector("[name=cloth_type]:checked");
const clothType = () => clothTypeInput().value;

/** The garments that the type of cloth takes, by their tiles; the first one is `cloth_image`. */
function garments() {
  const kind = clothType();
  if (kind === "lower") return ["lower"];
  if (kind !== "overall") return ["upper"];
  return document.querySelector("[name=outfit]:checked").value === "one" ? ["dress"] : ["upper", "lower"];
}

/** The tile of a picture by its field of the form. */
function tileOf(field) {
  return { person_image: "person", cloth_image: garments()[0], lower_cloth_image: "lower" }[field];
}

function missing() {
  return ["person", ...garments()].filter((name) => pictures.picture(name) === null);
}

/** The files of the request by their fields, without a painted mask. */
function chosenFiles() {
  const [cloth, lower] = garments();
  const tiles = { person_image: "person", cloth_image: cloth, ...(lower && { lower_cloth_image: lower }) };
  return Object.entries(tiles).map(([field, name]) => ({ field, ...pictures.picture(name) }));
}

function fields() {
  return { cloth_type: clothType(), ...optionValues() };
}

async function form() {
  const sent = new FormData();
  for (const { field, file, name } of chosenFiles()) sent.append(field, file, name);
  for (const [name, value] of Object.entries(fields())) sent.append(name, value);
  if (editor.isEdited) sent.append("mask_image", await editor.file(), "mask.png");
  return sent;
}

// --- errors, each near what it concerns

function setError(place, sentence) {
  const tiles = ["person", "upper", "lower", "dress"];
  if (tiles.includes(place)) {
    pictures.setError(place, sentence);
    return;
  }
  find(`error-${place}`).textContent = sentence;
  find(place)?.setAttribute("aria-invalid", String(sentence !== ""));
}

function clearErrors() {
  for (const place of [...OPTIONS, "cloth_type", "mask_image", "pictures", "api-key", "run"]) setError(place, "");
  adviseNothing();
}

function placeOf(error) {
  if (!(error instanceof ServiceError)) return "run";
  const field = error.field?.replace("_image_url", "_image").replace("_cloth_url", "_cloth_image");
  if (tileOf(field)) return tileOf(field);
  if (field && (field === "mask_image" || field === "cloth_type" || OPTIONS.includes(field))) return field;
  if (OF_THE_PHOTO.includes(error.code)) return "mask_image";
  if (error.status === 401 || error.status === 403) return "api-key";
  if (!error.code.startsWith("image_")) return "run";
  return editor.hasAutomatic && garments().length === 1 ? garments()[0] : "pictures"; // a masked photo is well
}

function tell(error, place = placeOf(error)) {
  if (!(error instanceof ServiceError)) {
    console.error(error);
    setError(place, "This page failed. Reloading it may help.");
    return;
  }
  if (error.status === 0 || error.code === "not_ready") watch();
  let advice = error.code === "person_not_found" ? " Another photo may help, or a mask painted by hand." : "";
  if (error.retryable && place === "run") advise(error.retryAfterS);
  else if (error.retryable && !/try again/i.test(error.sentence))
    advice = ` Trying again may help${error.retryAfterS ? ` in ${error.retryAfterS} s` : ""}.`;
  setError(place, `${error.sentence}${advice}`);
}

/** Whether all that is set can be sent; if not, it is said where it is wrong, and the first such place is gone to. */
function isComplete() {
  clearErrors();
  for (const name of missing()) pictures.setError(name, "This picture is needed.");
  const wrong = OPTIONS.filter((name) => refusalOf(name) !== null);
  for (const name of wrong) setError(name, refusalOf(name));
  if (missing().length) pictures.focus(missing()[0]);
  else if (wrong.length) find(wrong[0]).focus();
  return missing().length === 0 && wrong.length === 0;
}

// --- the pictures and their mask

function onType() {
  const kind = clothType();
  find("cloth-type-hint").textContent = clothTypeInput().dataset.hint;
  find("outfit").hidden = kind !== "overall";
  onOutfit();
  editor.chooseType(kind);
  makeMask();
}

function onOutfit() {
  pictures.show(["person", ...garments()]);
  clearErrors();
  showRequest();
}

function onPicture(name) {
  for (const place of ["pictures", "run"]) setError(place, "");
  adviseNothing();
  if (name === "person" && pictures.picture(name) !== state.photo) openPhoto(pictures.picture(name));
  showRequest();
}

function openPhoto(photo) {
  state.masking.abort();
  state.masking = new AbortController();
  state.pending = new Set();
  state.photo = photo;
  find("editor").hidden = find("mask-tag").hidden = photo === null;
  find("mask-empty").hidden = photo !== null;
  if (photo === null) return;
  find("mask-photo").src = photo.shown;
  showCrop(photo.width / photo.height);
  editor.open(photo.width, photo.height);
  makeMask();
}

/** Shades what the model does not see: it takes the middle of a photo, in its own proportions. */
function showCrop(ratio) {
  const stage = find("mask-stage");
  stage.style.setProperty("--ratio", ratio);
  stage.style.setProperty("--beside", `${50 * Math.max(0, 1 - state.ratio / ratio)}%`);
  stage.style.setProperty("--above", `${50 * Math.max(0, 1 - ratio / state.ratio)}%`);
  find("crop-hint").hidden = Math.abs(ratio / state.ratio - 1) < 0.02;
}

/** Asks for the automatic mask of the photo and the type of cloth, once. */
async function makeMask() {
  const kind = clothType();
  const { photo, pending } = state;
  find("mask-again").hidden = true;
  showVeil();
  if (photo === null || state.health !== "healthy" || editor.hasAutomatic || pending.has(kind)) return;
  setError("mask_image", "");
  setError("api-key", "");
  pending.add(kind);
  showVeil();
  try {
    const asked = new FormData();
    asked.append("person_image", photo.file, photo.name);
    asked.append("cloth_type", kind);
    const made = await createImageBitmap(await readMask(asked, find("api-key").value, state.masking.signal));
    if (photo === state.photo) editor.keepAutomatic(kind, made);
  } catch (error) {
    if (photo === state.photo && kind === clothType()) onMaskFailed(error);
  } finally {
    pending.delete(kind);
    showVeil();
  }
}

function showVeil() {
  const waits = state.health !== "healthy" && !editor.hasAutomatic;
  find("mask-wait").hidden = !(waits || state.pending.has(clothType()));
  find("mask-wait-text").textContent = waits ? "The mask comes when the service is ready" : "Masking the photo";
}

function onMaskFailed(error) {
  if (error instanceof ServiceError && error.field === "mask_image") {
    setError("mask_image", "This service makes no masks. Paint what is to be replaced.");
    return;
  }
  const place = placeOf(error);
  tell(error, { run: "mask_image", pictures: "person" }[place] ?? place);
  find("mask-again").hidden = !(error.retryable || place === "api-key");
}

function onMask() {
  const { canUndo, hasAutomatic, isEdited } = editor;
  find("undo").disabled = !canUndo;
  find("reset").disabled = !hasAutomatic || !isEdited;
  find("save-mask").disabled = !hasAutomatic && !isEdited;
  document.querySelector(`[name=tool][value=${editor.erasing ? "erase" : "paint"}]`).checked = true;
  find("brush").value = Math.round(100 * editor.brush);
  find("brush-size").textContent = `${editor.brushPixels} px`;
  find("brush").setAttribute("aria-valuetext", `${editor.brushPixels} pixels`);
  editor.showRing();
  const told = `${isEdited ? "Edited" : "Automatic"}, ${Math.round(100 * editor.coverage())} % of the photo`;
  find("mask-tag").textContent = isEdited || hasAutomatic ? told : "No mask yet";
  showRequest();
}

async function useExamples() {
  const button = find("examples");
  state.example = (state.example + 1) % state.examples;
  button.disabled = true;
  try {
    await pictures.useExample(state.example);
    button.textContent = "Use another example";
  } catch {
    setError("pictures", "The example pictures could not be fetched.");
  } finally {
    button.disabled = false;
  }
}

// --- the run

async function run() {
  if (state.running || !isComplete()) return;
  if (state.health !== "healthy") {
    setError("run", NOT_NOW[state.health]);
    watch();
    return;
  }
  const running = (state.running = new AbortController());
  const photo = state.photo.file;
  showRunning(true);
  const began = Date.now();
  const clock = setInterval(() => (find("elapsed").textContent = `${Math.round((Date.now() - began) / 1000)} s`), 200);
  try {
    const made = await tryOn(await form(), find("api-key").value, running.signal, showStep);
    await result.show(made, photo, Date.now() - began);
    announce("The result is there.");
  } catch (error) {
    if (running.signal.aborted) announce("Cancelled.");
    else tell(error);
  } finally {
    clearInterval(clock);
    state.running = null;
    showRunning(false);
  }
}

function showRunning(isRunning) {
  find("run").hidden = find("result-empty").hidden = isRunning;
  find("cancel").hidden = find("progress").hidden = !isRunning;
  find("elapsed").textContent = "";
  find("result").setAttribute("aria-busy", String(isRunning));
  if (isRunning) {
    find("progress-bar").removeAttribute("value");
    find("progress-text").textContent = "Sending the pictures";
    announce("Started.");
    find("cancel").focus();
    return;
  }
  find("result-empty").hidden = result.isShown;
  if (document.activeElement === document.body || document.activeElement === find("cancel")) find("run").focus();
}

function showStep(done, total) {
  const told = done === 0 ? "Waiting for its turn" : done < total ? `Step ${done} of ${total}` : "Finishing";
  find("progress-text").textContent = told;
  if (done > 0) find("progress-bar").value = done / total;
  if (done === 0 || done % Math.ceil(total / 4) === 0) announce(told);
}

function announce(sentence) {
  find("announce").textContent = sentence;
}

// --- the request as text

function showRequest() {
  const complete = missing().length === 0 && OPTIONS.every((name) => refusalOf(name) === null);
  find("request-empty").hidden = complete;
  find("curl").hidden = find("boto3").hidden = !complete;
  if (!complete) return;
  const files = chosenFiles();
  if (editor.isEdited) files.push({ field: "mask_image", name: "mask.png" });
  const request = { files, fields: fields(), key: !find("key-field").hidden };
  find("curl-text").textContent = curlText(request, location.origin);
  find("boto3-text").textContent = boto3Text(request);
}

async function saveMask() {
  const link = document.createElement("a");
  link.download = "mask.png";
  link.href = URL.createObjectURL(await editor.file());
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- the service

async function watch() {
  clearTimeout(state.poll);
  const told = await readSettings().catch(() => ({ status: "unreachable" }));
  if (told.limits && !state.known) use(told);
  const before = state.health;
  state.health = told.status;
  find("health").dataset.state = told.status;
  if (find("health-text").textContent !== HEALTH[told.status]) find("health-text").textContent = HEALTH[told.status];
  if (told.status === "healthy" && before !== "healthy") {
    setError("run", "");
    makeMask();
  }
  clearTimeout(state.poll);
  state.poll = setTimeout(watch, told.status === "healthy" ? IDLE_POLL_MS : POLL_MS);
}

/** Sets what the service says of itself, when it is first reached. */
function use(settings) {
  state.known = true;
  setOptions(settings);
  find("model-size").textContent = `${settings.width} × ${settings.height}`;
  find("about-model").hidden = !settings.embedded;
  find("key-field").hidden = !settings.needs_key;
  state.examples = settings.examples;
  state.ratio = settings.width / settings.height;
  pictures.limits = settings.limits;
  showRequest();
}

// --- wiring

for (const [name, changed] of [["cloth_type", onType], ["outfit", onOutfit]]) {
  for (const input of document.querySelectorAll(`[name=${name}]`)) input.addEventListener("change", changed);
}
for (const input of document.querySelectorAll("[name=tool]")) {
  input.addEventListener("change", () => {
    editor.erasing = input.value === "erase";
    onMask();
  });
}
find("brush").addEventListener("input", () => {
  editor.brush = find("brush").value / 100;
  onMask();
});
for (const name of OPTIONS) {
  find(name).addEventListener("input", () => {
    setError(name, "");
    showRequest();
  });
}
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
find("undo").addEventListener("click", () => editor.undo());
find("clear").addEventListener("click", () => editor.clear());
find("reset").addEventListener("click", () => editor.useAutomatic());
find("save-mask").addEventListener("click", saveMask);
find("mask-again").addEventListener("click", makeMask);
find("api-key").addEventListener("change", makeMask);
find("key-field").addEventListener("submit", (event) => event.preventDefault());
find("examples").addEventListener("click", useExamples);
find("run").addEventListener("click", run);
find("cancel").addEventListener("click", () => state.running?.abort());
onType();
watch();

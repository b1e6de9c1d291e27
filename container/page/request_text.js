// The request of the page, as a shell command and as Python code.

const PLAIN = /^[A-Za-z0-9._/-]+$/;
const SUFFIX = { jpeg: "jpg", png: "png", webp: "webp" };
const UNPACK =
  `python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["imageBase64"]))'`;

/** The name of the file that a result of this format has. */
export function resultName(format) {
  return `result.${SUFFIX[format]}`;
}

/**
 * A command that asks this service for the same picture.
 * @param request {files: [{field, name, url}], fields: {name: value}, key: boolean}; a file with a url is fetched there.
 */
export function curlText(request, origin) {
  const { files, notes } = namedFiles(request);
  const lines = files
    .filter((file) => file.url)
    .map((file) => `curl --fail --silent --show-error --remote-name ${quoted(origin + file.url)}\n`);
  const parts = [`curl --fail --silent --show-error ${quoted(`${origin}/api/try-on`)}`];
  if (request.key) parts.push(`-H "X-API-Key: $VTON_API_KEY"`);
  for (const file of files) parts.push(`-F ${quoted(`${file.field}=@${formName(file.name)}`)}`);
  for (const [name, value] of Object.entries(request.fields)) parts.push(`-F ${quoted(`${name}=${value}`)}`);
  parts.push(`| ${UNPACK} > ${resultName(request.fields.output_format)}`);
  return `${lines.join("")}${notes}${parts.join(" \\\n  ")}\n`;
}

/** Python that asks a deployed endpoint for the same picture; the endpoint fetches the files from its bucket. */
export function boto3Text(request) {
  const { cloth_type, num_inference_steps, guidance_scale, seed, output_size, output_format, quality } = request.fields;
  const { files, notes } = namedFiles(request);
  const paths = files.map((file) => `    ${python(urlField(file.field, request))}: ${python(file.name)},`);
  return `import json
import time

import boto3
from botocore.config import Config

BUCKET, ENDPOINT = "your-bucket", "vton"  # of your deployment
USER, TIMESTAMP = "page", time.strftime("%y%m%d-%H%M%S")
${notes}FILES = {
${paths.join("\n")}
}

request = {
    "userId": USER,
    "timestamp": TIMESTAMP,
    "cloth_type": ${python(cloth_type)},
    "num_inference_steps": ${num_inference_steps},
    "guidance_scale": ${guidance_scale},
    "seed": ${seed},
    "output_size": ${python(output_size)},
    "output_format": ${python(output_format)},
    "quality": ${python(quality)},
}
s3 = boto3.client("s3")
for field, path in FILES.items():
    key = f"users/{USER}/uploads/{TIMESTAMP}/{field}"
    s3.upload_file(path, BUCKET, key)
    request[field] = f"s3://{BUCKET}/{key}"

# The default client sends a slow call again, and pays for it again.
once = Config(read_timeout=70, retries={"total_max_attempts": 1})
runtime = boto3.client("sagemaker-runtime", config=once)
response = runtime.invoke_endpoint(EndpointName=ENDPOINT, ContentType="application/json", Body=json.dumps(request))
answer = json.loads(response["Body"].read())
s3.download_file(BUCKET, answer["object_key"], ${python(resultName(output_format))})
print(answer["object_key"], answer["seed"])
`;
}

/**
 * The files as the texts name them, and comments on that. Where two names would be one, also that of the result or one
 * that differs in case alone, the chosen files are named after their fields.
 */
function namedFiles(request) {
  const notes = [];
  let { files } = request;
  const names = [...files.map((file) => file.name), resultName(request.fields.output_format)];
  if (new Set(names.map((name) => name.toLowerCase())).size < names.length) {
    files = files.map((file) => (isChosen(file) ? { ...file, name: fieldName(file) } : file));
    const told = files.filter(isChosen).map((file) => file.name);
    notes.push(`# names repeat: copy what was chosen to ${told.join(" and ")} first\n`);
  }
  if (files.some((file) => file.field === "mask_image")) notes.push("# mask.png is what “Download mask” saves\n");
  return { files, notes: notes.join("") };
}

/** Whether a file has its name from the user, not from this page. */
function isChosen(file) {
  return !file.url && file.field !== "mask_image";
}

function fieldName({ field, name }) {
  return field.replace("_image", "") + (/\.\w+$/.exec(name)?.[0] ?? "");
}

/** The name that /invocations has for a picture of the form. */
function urlField(field, request) {
  const lower = request.files.some((file) => file.field === "lower_cloth_image");
  const cloth = { lower: "lower_cloth_url", overall: lower ? "upper_cloth_url" : "overall_cloth_url" };
  return {
    person_image: "person_image_url",
    cloth_image: cloth[request.fields.cloth_type] ?? "upper_cloth_url",
    lower_cloth_image: "lower_cloth_url",
    mask_image: "mask_image_url",
  }[field];
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** A path as curl's -F takes it: commas, semicolons and quotes end what is not quoted. */
function formName(name) {
  return PLAIN.test(name) ? name : `"${name.replace(/["\\]/g, "\\$&")}"`;
}

function python(text) {
  return JSON.stringify(text);
}

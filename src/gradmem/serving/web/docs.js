// Shows the OpenAPI document of the server.
import { make, the } from "./dom.js";

let schemas = {};

const named = (schema) => (schema?.$ref ? schemas[schema.$ref.split("/").at(-1)] : schema);

/** A type in a few words. */
function kind(schema) {
  const own = named(schema) ?? {};
  if (own.anyOf) return own.anyOf.map(kind).join(" or ");
  if (own.type === "array") return `list of ${kind(own.items)}`;
  if (own.enum) return own.enum.map((value) => JSON.stringify(value)).join(" or ");
  if ("const" in own) return JSON.stringify(own.const);
  return own.type ?? "anything";
}

/** One line for each field: its name, whether it is required, its type, its meaning. */
function field(name, schema, needed) {
  const own = named(schema) ?? {};
  const parts = [needed ? "required" : "", kind(schema), schema.description ?? own.description ?? ""].filter(Boolean);
  return [make("dt", {}, make("code", {}, name)), make("dd", {}, parts.join(" · "))];
}

function fields(operation) {
  const found = (operation.parameters ?? []).flatMap((one) =>
    field(one.name, { ...one.schema, ...(one.description && { description: one.description }) }, one.required),
  );
  for (const [type, body] of Object.entries(operation.requestBody?.content ?? {})) {
    const { properties, required = [] } = named(body.schema) ?? {};
    if (properties) {
      for (const [name, schema] of Object.entries(properties)) found.push(...field(name, schema, required.includes(name)));
    } else {
      found.push(...field("body", { type }, true));
    }
  }
  return found;
}

function card(method, path, operation) {
  const title = make("h3", {}, make("code", {}, `${method.toUpperCase()} ${path}`));
  const about = make("p", {}, operation.description ?? operation.summary ?? "");
  return make("div", { className: "card" }, title, about, make("dl", {}, ...fields(operation)));
}

function show(api) {
  schemas = api.components?.schemas ?? {};
  the("lead").textContent = `${api.info.title} ${api.info.version}. ${api.info.description ?? ""}`;
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(card(method, path, operation));
    }
  }
  const sections = [...groups].map(([tag, cards]) => make("section", {}, make("h2", {}, tag), ...cards));
  the("operations").replaceChildren(...sections);
}

try {
  show(await (await fetch("openapi.json")).json());
} catch {
  the("error").textContent = "The server does not answer. Is `gradmem serve` still running?";
}

// OpenAI's client for JavaScript: `node openai_client.mjs URL MODEL` prints one JSON object of what it got.
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "How many days has a week?" }];
const greedy = { model, temperature: 0, max_tokens: 16 };
const found = {};

found.models = (await client.models.list()).data.map((each) => each.id);

const whole = await client.chat.completions.create({ ...greedy, messages });
found.chat = whole.choices[0].message.content;
found.usage = whole.usage;

found.streamed = "";
for await (const chunk of await client.chat.completions.create({ ...greedy, messages, stream: true })) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
}

const completion = await client.completions.create({ ...greedy, prompt: "The sea is", logprobs: 2 });
found.completion = completion.choices[0].text;
found.logprobs = completion.choices[0].logprobs.token_logprobs.length;

const schema = { type: "object", properties: { days: { enum: [5, 7] } }, required: ["days"], additionalProperties: false };
const json = await client.chat.completions.create({
  ...greedy,
  messages,
  response_format: { type: "json_schema", json_schema: { name: "week", schema, strict: true } },
});
found.json = JSON.parse(json.choices[0].message.content);

try {
  await client.chat.completions.create({ ...greedy, messages, temperature: 9 });
} catch (error) {
  found.refused = { status: error.status, kind: error.constructor.name, param: error.param };
}
const stream = await client.chat.completions.create({ ...greedy, messages, max_tokens: 400, stream: true });
for await (const _ of stream) break; // which aborts the request
found.aborted = stream.controller.signal.aborted;
console.log(JSON.stringify(found));
